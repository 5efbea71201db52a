from tests.data import trees

NAMES = ("dtd", "dtd:1")
HAS_TEST = False


def small(name, root):
    return trees.dtd(root, name)
