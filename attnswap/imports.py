"""Act on a module of another library right after its import, without importing it."""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], object]


def after_import(name: str, action: Action) -> None:
    """Calls an action with a module: now if it is imported already, else right after its import.

    The action runs before the import statement returns, and again after each reload.

    Args:
        name: Full name of the module, such as ``"transformers.modeling_utils"``.
        action: Takes the module. A second call with the same module must change nothing.
    """
    actions = _FINDER.actions.setdefault(name, [])
    if action not in actions:
        actions.append(action)
    _FINDER.waiting.add((name, action))
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if sys.modules.get(name) is not None:
        importlib.import_module(name)  # waits if another thread is importing it
    _FINDER.catch_up()


class _Finder:
    """A finder for ``sys.meta_path`` that leaves the search to the finders after it and wraps the loader they find.

    Attributes:
        actions: The actions by module name.
        waiting: The names and actions that have not run yet.
    """

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}
        self.waiting: set[tuple[str, Action]] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of a module that has an action, with its loader wrapped; None for any other module."""
        self.catch_up()
        if name not in self.actions:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    def catch_up(self) -> None:
        """Runs the actions of modules that were imported without this finder.

        Either their import had already begun when the action was added, or a finder before this one found them.
        """
        for name, action in list(self.waiting):
            module = sys.modules.get(name)
            if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
                continue
            try:
                self.waiting.remove((name, action))
            except KeyError:  # another thread was faster
                continue
            action(module)


class _Loader:
    """Loads a module by its own loader, then runs its actions. The module keeps no trace of this loader."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        """Gives the rest of the module's own loader, such as ``get_source``, to readers of its spec."""
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module's code and then the actions."""
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        for action in self._finder.actions[spec.name]:
            self._finder.waiting.discard((spec.name, action))
            action(module)


_FINDER = _Finder()
