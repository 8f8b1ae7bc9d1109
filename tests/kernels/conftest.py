"""The tests of kernels run in Triton's interpreter, which is made quicker here; no result depends on it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dtrain.kernels.launch import HAS_TRITON, triton


@pytest.fixture(scope="session", autouse=True)
def language_is_patched_once_a_launch() -> Iterator[None]:
    """The interpreter puts its own functions into `triton.language`, for each launch and, to no effect, again
    at each call of a function by a kernel: a quarter of the time."""
    if not (HAS_TRITON and triton.knobs.runtime.interpret):
        yield
        return
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_once(function: Callable[..., Any]) -> Any:
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield
