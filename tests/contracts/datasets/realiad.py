from tests.data import trees

NAMES = ("realiad", "realiad:single")


def small(name, root):
    return trees.realiad(root, name=name)
