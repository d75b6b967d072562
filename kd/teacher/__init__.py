"""Where the teacher lives."""

from kd.teacher.local import (
    LocalTeacher,
    LocalTeacherConfig,
    NoTeacher,
    NoTeacherConfig,
    TeacherConfig,
)

__all__ = [
    "LocalTeacher",
    "LocalTeacherConfig",
    "NoTeacher",
    "NoTeacherConfig",
    "TeacherConfig",
]
