"""What a kill does at a chosen call, in this process and without ending the test."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class PowerCutError(BaseException):
    """What a kill does, without ending the test."""


@contextmanager
def cut_at(monkeypatch: pytest.MonkeyPatch, target: str, call: int) -> Iterator[None]:
    """Within it the n-th call of what ``target`` names, a function or a method, is never made: there the power goes.

    Fails where that call is not reached.
    """
    calls: list[int] = []
    real = pkgutil.resolve_name(target)

    def cut(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise PowerCutError
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, cut)
        with pytest.raises(PowerCutError):
            yield
