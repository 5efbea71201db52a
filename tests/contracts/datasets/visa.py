from tests.data import trees

NAMES = ("visa", "visa:highshot", "visa:fewshot")
LABELLED_TRAIN = NAMES[1:]


def small(name, root):
    return trees.visa(root, name)
