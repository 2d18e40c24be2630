"""A user's Python file, and what of it a class needs: only that is carried by an exported pipeline, and runs there.

So a file that trains a network when it is run can define it too, and what else it imports is not needed elsewhere. Which
names a statement gives a meaning to, and which ones it and all defined in it look up, is what the compiler says
(``symtable``).
"""

import ast
import builtins
import importlib.util
import io
import re
import symtable
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

PACKAGES = ("distill", "teachers")
REGISTERS = ("register", "teachers.register")
ALWAYS_THERE = {*dir(builtins), "__name__", "__file__", "__doc__"}


class Statement:
    """A statement at the top level of a file.

    Attributes:
        first, rows: indices of its first line, and of all but those of a decorator that registers a class.
        binds, changes, reads: names that it gives a meaning to, that it changes (``TABLE[1] = 2``), that it looks up at the
            top level.
        imports: what it imports, by name.
    """

    def __init__(self, node: ast.stmt, lines: list[str]):
        self.node = node
        decorators = getattr(node, "decorator_list", [])
        self.first = min(n.lineno for n in (node, *decorators)) - 1
        dropped = {row for d in decorators if ast.unparse(d) in REGISTERS for row in range(d.lineno - 1, d.end_lineno)}
        self.rows = [row for row in range(self.first, node.end_lineno) if row not in dropped]
        table = symtable.symtable("".join(lines[row] for row in self.rows), "", "exec")
        self.binds, self.changes, self.reads = bound_names(table), changed_names(node), read_names(table)
        self.imports = import_targets([node])

    @property
    def is_definition(self) -> bool:
        """Neither a call, nor what is done only when the file is run."""
        main_guard = isinstance(self.node, ast.If) and "__name__" in ast.unparse(self.node.test)
        return not isinstance(self.node, ast.Expr) and not main_guard

    @property
    def imports_ours(self) -> bool:
        return any(module.split(".")[0] in PACKAGES for module, *_ in self.imports.values())


class OwnFile:
    """A user's file by its path, for messages, and its text."""

    def __init__(self, path: str, source: str):
        self.name, self.lines = Path(path).name, list(io.StringIO(source))
        self.statements = [Statement(node, self.lines) for node in ast.parse(source).body]

    def extract(self, name: str, ours: str) -> str:
        """The text of everything that ``name`` needs, to be put after the code ``ours``.

        Imports from this package are left out: what they name is in ``ours``. Comments between statements stay.

        Raises:
            ValueError: something that would not be there, or a name that means something else in ``ours``.
        """
        kept = self.needed_by(name)
        self.check_imports(kept)
        self.check_names(kept, ours)
        stay = {row for s in kept if not s.imports_ours for row in s.rows}
        gone = {row for s in self.statements for row in range(s.first, s.node.end_lineno)} - stay
        lines = ["" if row in gone else line for row, line in enumerate(self.lines)]
        for s in kept:
            lines[s.first] += renamings(s)
        return re.sub(r"\n{4,}", "\n\n\n", "".join(lines)).strip() + "\n"

    def needed_by(self, name: str) -> list[Statement]:
        """The statements without which ``name`` would not mean what it does, in the order of the file."""
        kept: set[Statement] = set()
        waiting = [name]
        while waiting:
            name = waiting.pop()
            found = [s for s in self.statements if s.is_definition and name in s.binds | s.changes and s not in kept]
            kept.update(found)
            waiting += [read for s in found for read in s.reads]
        return [s for s in self.statements if s in kept]

    def check_imports(self, kept: list[Statement]) -> None:
        """Raise ``ValueError`` for an import that fails where there is neither this package nor the user's other files."""
        top = {s.node for s in kept}
        for node in (n for s in kept for n in ast.walk(s.node) if isinstance(n, ast.Import | ast.ImportFrom)):
            for module, *_ in import_targets([node]).values():
                package = module.split(".")[0]
                if package in PACKAGES and not (node in top and isinstance(node, ast.ImportFrom)):
                    raise ValueError(
                        f"{self.name}, line {node.lineno}: there is no {package} where an exported pipeline is loaded; name "
                        f"what the network needs of it at the top of the file (from {package}.... import NAME)"
                    )
                if package not in PACKAGES and is_another_file(package):
                    raise ValueError(
                        f"{self.name}, line {node.lineno}: the network needs {module}, which is of no installed package; "
                        "an exported pipeline carries one file, so move it there"
                    )

    def check_names(self, kept: list[Statement], ours: str) -> None:
        """Raise ``ValueError`` for a name that means nothing without the rest of the file, or something else in ``ours``."""
        there = bound_names(symtable.symtable(ours, "", "exec"))
        imports = import_targets(ast.parse(ours).body)
        bound = {name for s in kept for name in s.binds}
        for s in kept:
            where = f"{self.name}, line {s.node.lineno}"
            if unknown := sorted(s.reads - bound - ALWAYS_THERE):
                raise ValueError(f"{where}: {unknown[0]} has no definition or import that could be carried along")
            if s.imports_ours:
                missing = [name for _, name in s.imports.values() if name not in there]
                same = {name for name, (_, theirs) in s.imports.items() if name == theirs}
            else:
                missing, same = [], {name for name, target in s.imports.items() if imports.get(name) == target}
            if missing:
                raise ValueError(f"{where}: {missing[0]} is not in the code that an exported pipeline carries")
            if clash := sorted(s.binds & there - same):
                raise ValueError(f"{where}: the name {clash[0]} is taken in the code of the pipeline; give it another one")


def bound_names(table: symtable.SymbolTable) -> set[str]:
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}


def read_names(table: symtable.SymbolTable) -> set[str]:
    """The names that a module, and whatever is defined in it, looks up in the module."""
    module = table.get_type() == "module"
    own = {s.get_name() for s in table.get_symbols() if (s.is_referenced() if module else s.is_global())}
    return own.union(*map(read_names, table.get_children()))


def changed_names(node: ast.stmt) -> set[str]:
    """``x`` of ``x[1] = 2`` and ``x.y = 2`` outside of definitions."""
    found = set()
    for target in ast.walk(node) if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else ():
        if isinstance(target, ast.Subscript | ast.Attribute) and isinstance(target.ctx, ast.Store):
            while isinstance(target, ast.Subscript | ast.Attribute):
                target = target.value
            found |= {target.id} if isinstance(target, ast.Name) else set()
    return found


def import_targets(nodes: list[ast.stmt]) -> dict[str, tuple[str, ...]]:
    """``{"torch": ("torch",), "nn": ("torch", "nn")}`` for ``import torch`` and ``from torch import nn``."""
    found: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for a in node.names:
                found[a.asname or a.name.split(".")[0]] = (a.name if a.asname else a.name.split(".")[0],)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {a.asname or a.name: (module, a.name) for a in node.names}
    return found


def renamings(s: Statement) -> str:
    """What stands for ``from teachers.x import name as other``; the name itself is there already."""
    if not s.imports_ours:
        return ""
    return "".join(f"{name} = {theirs}\n" for name, (_, theirs) in s.imports.items() if name != theirs)


def is_another_file(package: str) -> bool:
    """Whether a package, or what a relative import names, is found here but belongs to nothing that is installed."""
    if not package:
        return True
    return package not in installed_packages() and importlib.util.find_spec(package) is not None


@cache
def installed_packages() -> set[str]:
    return {*sys.stdlib_module_names, *packages_distributions()}
