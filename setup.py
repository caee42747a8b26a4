"""Which packages there are: those of jaxtok/, and configs/, which is installed as jaxtok/configs."""

from setuptools import find_namespace_packages, setup

families = [f"jaxtok.configs.{name}" for name in find_namespace_packages("configs")]
setup(
    packages=[*find_namespace_packages(include=["jaxtok", "jaxtok.*"]), "jaxtok.configs", *families],
    package_dir={"jaxtok.configs": "configs"},
)
