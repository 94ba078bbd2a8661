"""What pyproject.toml cannot say: the top-level folder ``kernels`` is the package ``ood_fast.kernels``.

``find_packages`` picks up new subpackages of ``ood_fast`` by itself.
"""

import base64
import hashlib
import pathlib
import zipfile

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel


class EditableWheel(editable_wheel):
    """An editable install that also works in the folder that holds the checkout.

    Because of the mapping, setuptools serves an editable install by an import hook, which comes after the path. Then a
    script beside a checkout named ``ood_fast`` finds that folder first, as an empty namespace package. A path entry for
    the checkout itself wins against it; the hook still serves ``ood_fast.kernels``.
    """

    def run(self):
        super().run()
        (wheel,) = pathlib.Path(self.dist_dir).glob("*.whl")
        name, content = "__editable__.ood_fast-root.pth", f"{pathlib.Path(__file__).parent.resolve()}\n".encode()
        with zipfile.ZipFile(wheel) as archive:
            files = {item.filename: archive.read(item) for item in archive.infolist()}
        (record,) = (file for file in files if file.endswith(".dist-info/RECORD"))
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        files[record] += f"{name},sha256={digest},{len(content)}\n".encode()
        files[name] = content
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, data in files.items():
                archive.writestr(file, data)


setup(
    packages=[*find_packages(include=["ood_fast", "ood_fast.*"]), "ood_fast.kernels"],
    package_dir={"ood_fast.kernels": "kernels"},
    cmdclass={"editable_wheel": EditableWheel},
)
