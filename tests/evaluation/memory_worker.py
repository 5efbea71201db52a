"""Peak memory in bytes of a process that scores FILE, COUNT times, with the model in DIR."""

import pathlib
import sys

import dsad
from dsad.assembly import pictures


def main() -> None:
    model = dsad.load(sys.argv[1])
    count = 0
    for images, _ in model.stream(pictures.source([sys.argv[2]] * int(sys.argv[3])), batch=8):
        count += len([model.original(image) for image in images])
    text = pathlib.Path("/proc/self/status").read_text()
    print(int(text.split("VmHWM:")[1].split()[0]) * 1024, count)


if __name__ == "__main__":
    main()
