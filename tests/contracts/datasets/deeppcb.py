from tests.data import trees


def small(name, root):
    return trees.deeppcb(root)
