import kd  # noqa: F401  before torch is: see kd/process.py
