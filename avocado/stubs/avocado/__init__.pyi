"""The parts of avocado-framework that the tests use. It has no type hints of its own."""

import logging
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar
from unittest import TestCase

_F = TypeVar("_F", bound=Callable[..., Any])

class Test(TestCase):
    cache_dirs: list[str]
    log: logging.Logger
    logdir: str
    params: Any
    workdir: str
    whiteboard: str
    def cancel(self, msg: str | None = None) -> NoReturn: ...

def fail_on(exceptions: type[BaseException]) -> Callable[[_F], _F]: ...
