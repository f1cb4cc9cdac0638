from setuptools import setup

# kernels/ stands beside mfengine/, and installs inside of it: a top-level package `kernels` is somebody else's.
setup(
    packages=["mfengine", "mfengine.engine", "mfengine.kernels", "mfengine.method", "mfengine.model", "mfengine.ops"],
    package_dir={"mfengine.kernels": "kernels"},
)
