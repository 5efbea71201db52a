from tests.data import trees


def small(name, root):
    return trees.realiad_variety(root)
