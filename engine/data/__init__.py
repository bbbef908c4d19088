"""Images to train on and to compare with: read, checked, prepared, drawn, augmented."""
