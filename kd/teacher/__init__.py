"""Where the teacher lives."""

from kd.teacher.base import BaseTeacher, NoTeacher, NoTeacherConfig, TeacherConfig
from kd.teacher.cached_config import CachedTeacherConfig
from kd.teacher.engine import KdServe
from kd.teacher.local import LocalTeacher, LocalTeacherConfig
from kd.teacher.server import ServerTeacherConfig
from kd.teacher.vllm import VllmServe

__all__ = [
    "BaseTeacher",
    "CachedTeacherConfig",
    "KdServe",
    "LocalTeacher",
    "LocalTeacherConfig",
    "NoTeacher",
    "NoTeacherConfig",
    "ServerTeacherConfig",
    "TeacherConfig",
    "VllmServe",
]
