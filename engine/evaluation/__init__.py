"""How far samples are from real images: what is measured, against what, and the table that is made of it."""
