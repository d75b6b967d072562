"""A teacher behind HTTP: `python -m kd.serve teacher.name=…`. What it speaks: kd.teacher.wire."""
