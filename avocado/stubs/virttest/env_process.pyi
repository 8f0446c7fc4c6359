from collections.abc import Callable
from typing import Any

preprocess_vm_on_hook: Callable[[Any, Any, Any], None] | None
postprocess_vm_on_hook: Callable[[Any, Any, Any], None] | None
