"""Registry: names to objects."""

from __future__ import annotations

import pytest

from dassl.utils import InputError, Registry


def test_decorator_and_call():
    table = Registry("THING")

    @table.register()
    class First: ...

    class Second: ...

    assert table.register(Second) is Second
    assert table.get("First") is First and table.get("Second") is Second
    assert table.registered_names() == ["First", "Second"] == list(table)
    assert "First" in table and len(table) == 2


def test_a_name_is_taken_once():
    table = Registry("THING")

    def name(): ...

    old = table.register(name)

    def name(): ...  # noqa: F811

    with pytest.raises(KeyError, match='THING.*"name"'):
        table.register(name)
    assert table.get("name") is old
    table.register(name, force=True)
    assert table.get("name") is name


def test_unknown_name():
    table = Registry("TRAINER")

    class CoOp: ...

    table.register(CoOp)
    for kind in (KeyError, InputError):
        with pytest.raises(kind) as caught:
            table.get("coop")
        assert str(caught.value) == (
            'Expected a name in the registry TRAINER but got "coop" (did you mean "CoOp"?). Registered: CoOp'
        )
    with pytest.raises(KeyError) as caught:
        table.get("xyz123")
    assert "did you mean" not in str(caught.value)
