from tests.data import published_trees


def small(name, root):
    return published_trees.write(name, root)
