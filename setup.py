"""The one step of a build that pyproject.toml cannot state: configs/ goes into the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copies configs/ to pgpo_jax/configs/; an editable install reads the folder itself."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "pgpo_jax" / "configs"
            shutil.copytree("configs", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildPy})
