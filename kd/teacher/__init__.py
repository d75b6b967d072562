"""Where the teacher lives."""

from kd.teacher.base import BaseTeacher, NoTeacher, NoTeacherConfig, TeacherConfig
from kd.teacher.local import LocalTeacher, LocalTeacherConfig

__all__ = [
    "BaseTeacher",
    "LocalTeacher",
    "LocalTeacherConfig",
    "NoTeacher",
    "NoTeacherConfig",
    "TeacherConfig",
]
