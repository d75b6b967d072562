"""Where the teacher lives."""

from kd.teacher.base import BaseTeacher, NoTeacher, NoTeacherConfig, TeacherConfig
from kd.teacher.engine import KdServe
from kd.teacher.local import LocalTeacher, LocalTeacherConfig
from kd.teacher.server import ServerTeacherConfig
from kd.teacher.vllm import VllmServe

__all__ = [
    "BaseTeacher",
    "KdServe",
    "LocalTeacher",
    "LocalTeacherConfig",
    "NoTeacher",
    "NoTeacherConfig",
    "ServerTeacherConfig",
    "TeacherConfig",
    "VllmServe",
]
