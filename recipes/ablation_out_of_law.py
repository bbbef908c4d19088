"""Why a finite D is faster early on: how teachers of different D judge images that are none of the data's.

    python recipes/ablation_out_of_law.py --teachers runs/teachers/ddpmpp-D128 runs/teachers/ddpmpp-Dinf
    python recipes/ablation_out_of_law.py --teachers a/teacher b/teacher --images 500 --levels 8 --seeds 0 1 2 3 4

arXiv 2509.22454 gives two reasons (section 4): heavier tails hide the distance between the generator's images and the
data better, and teachers of smaller D are more robust. Both are measured where a distillation begins, on y = G_0(z),
the teacher's own images from one evaluation at sigma_init, under the noise of its own D, at noise levels by the law of
the generator's step:

* the teacher's error on these images relative to that on the data, ln(e_out / e_data), e the mean of
  ||T(y + noise, sigma) - y||^2; 1 - e_data / e_out is the share of its error that their being out of law makes. Robust
  is a low one.
* the share of noisy images, of data and of G_0, whose law the likelier of two mixtures tells wrongly. Hidden is a high
  share, at most 0.5 but for chance.

Each claim is confirmed where the 95 % t interval of the difference between the smallest and the largest D of the means
over the noise levels, by seed, lies on its side of 0, refuted where it lies on the other. The seeds are those of images
and noise: another teacher of the same D is another matter. What G_0 draws is smooth, and smooth images may be denoised
with a smaller error than the data, so that ln(e_out / e_data) is below 0, at any D. Takes a core some minutes, and
nothing is trained. Leaves out-of-law.md, out-of-law.csv and claims.csv in runs/ablation-out-of-law.
"""

from __future__ import annotations

from dataclasses import replace

from ipfm.engine.experiments import OutOfLaw, OutOfLawOptions, fashion, run_command
from ipfm.recipes import fashion_ipfm

ABLATION = OutOfLaw(
    file="ablation_out_of_law.py",
    about=__doc__ or "",
    data=lambda path: fashion.training_images(replace(fashion_ipfm.BASE, data=path, features="pixels")),
    base=OutOfLawOptions(),
)

main = ABLATION.main

if __name__ == "__main__":
    run_command(__file__, main)
