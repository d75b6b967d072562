"""Where the teacher lives."""

from kd.teacher.base import BaseTeacher, NoTeacher, NoTeacherConfig, TeacherConfig
from kd.teacher.engine import KdServe
from kd.teacher.local import LocalTeacher, LocalTeacherConfig
from kd.teacher.server import ServerTeacherConfig

__all__ = [
    "BaseTeacher",
    "KdServe",
    "LocalTeacher",
    "LocalTeacherConfig",
    "NoTeacher",
    "NoTeacherConfig",
    "ServerTeacherConfig",
    "TeacherConfig",
]
