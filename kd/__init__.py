"""Distillation of vision-language models."""

from kd.process import set_up

set_up()
