from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

def wait_for(func: Callable[[], _T], timeout: float, *, step: float = ...) -> _T | None: ...
