"""One teacher of few shapes and two distillations of it, by the functions that scripts call; then the same again."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from ipfm.engine.data.shapes import shapes
from ipfm.engine.distributed.world import start_world
from ipfm.engine.runtime.launcher import stop_world
from ipfm.recipes.shapes_ipfm import RECIPE, ShapesOptions

out = Path(json.loads(sys.argv[1])["out"])
world = start_world()
options = ShapesOptions(
    channels=4, batch=4, max_steps=2, teacher_steps=2, eval_images=8, heun_steps=1, lr=1e-3, ema_rampup=10.0
)
for repetition in (1, 2):
    recipe = replace(RECIPE, data=lambda: shapes(40), base=options, training=replace(RECIPE.training, batch=8))
    teacher = recipe.teacher(recipe.teaching(options), recipe.network(options, recipe.D), out / "teacher", world)
    tables = []
    for alpha in (0.5, 1.0):
        config = replace(options.distillation(), alpha=alpha)
        rows = recipe.distil(teacher, config, out / f"alpha{alpha:g}", world)
        # The speed is measured, and the second time read.
        tables.append([asdict(row) for row in rows])
    (out / f"rows{repetition}.json").write_text(json.dumps(tables))
stop_world()
