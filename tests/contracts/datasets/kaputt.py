import pytest

from tests.data import trees

NAMES = ("kaputt", "kaputt:image")
MASKED = False


def small(name, root):
    pytest.importorskip("pyarrow")
    return trees.kaputt(root, name)
