"""Copy the recipes of `configs/` into the wheel. All metadata is in setup.cfg."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Build the package with a copy of `configs/` in it. An editable install reads the folder itself."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for file in self._recipes():
                target = Path(self.build_lib, "entropy_trl", file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))

    def get_outputs(self, include_bytecode=True):
        recipes = [] if self.editable_mode else self._recipes()
        copies = [str(Path(self.build_lib, "entropy_trl", file)) for file in recipes]
        return super().get_outputs(include_bytecode) + copies

    @staticmethod
    def _recipes():
        return sorted(path for path in Path("configs").rglob("*") if path.is_file())


setup(cmdclass={"build_py": BuildWithRecipes})
