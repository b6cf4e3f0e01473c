"""Run a command of this project in its own environment, made at the first call. Needs nothing but Python >= 3.11.

    python3 jobs/in_venv.py jobs/train_uda.py          # make .venv if need be, then train the demo
    python3 jobs/in_venv.py -m pytest                  # make .venv if need be, then run the tests

The environment lies in `.venv` beside pyproject.toml and is made anew when that or constraints.txt changes.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv"
STAMP = HOME / "installed"


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file alone may meet an older Python
        sys.exit(f"error: Python {sys.version.split()[0]} is too old; call this with Python 3.11 or newer")
    python = HOME / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()).hexdigest()
    if not STAMP.exists() or STAMP.read_text() != wanted:
        print("installing into .venv (about 6 GB with torch's GPU libraries, some minutes) ...", flush=True)
        venv.create(HOME, with_pip=True)
        # pip compiles modules one after another; here all cores do.
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
                               "-c", ROOT / "constraints.txt", "-e", f"{ROOT}[test]"])
        if done.returncode:
            sys.exit("error: the installation failed, see above; mend it and call the same command again")
        libraries = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
        subprocess.run([python, "-m", "compileall", "-qq", "-j", "0", libraries.strip()])  # some files are no Python of today
        STAMP.write_text(wanted)
    if len(sys.argv) > 1:
        if os.name == "posix":  # in place of this process, so that signals reach the command itself
            os.execv(python, [str(python), *sys.argv[1:]])
        sys.exit(subprocess.run([python, *sys.argv[1:]]).returncode)
    print(f"ready: {python}")


if __name__ == "__main__":
    main()
