# SPDX-License-Identifier: Apache-2.0
"""Package description for pip and for colcon (ament_python)."""

from glob import glob
from xml.etree import ElementTree

from setuptools import find_packages, setup

package_name = "deq_flow_ros"

setup(
    name=package_name,
    version=ElementTree.parse("package.xml").findtext("version"),  # the one place: bloom reads and raises it there
    description="Dense optical flow for camera streams by deep equilibrium models, as a ROS 2 node",
    license="Apache-2.0",
    maintainer="deq_flow_ros maintainers",
    maintainer_email="maintainers@example.org",
    packages=find_packages(include=[package_name, f"{package_name}.*"]),
    package_data={
        package_name: ["py.typed"],
        f"{package_name}.model": ["weights/*.safetensors", "weights/*.md"],
        f"{package_name}.evaluation": ["*.yaml", "*.mplstyle", "templates/*"],
        f"{package_name}.ros.view": ["page/*"],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{package_name}"]),
        (f"share/{package_name}", ["package.xml", "LICENSE"]),
        (f"share/{package_name}/launch", glob("launch/*.launch.py")),
        (f"share/{package_name}/config", glob("config/*")),
        (f"share/{package_name}/examples", glob("examples/*.py")),
        # `ros2 run` and launch_ros look for executables here. Entry points would land in bin/ under pip, so these
        # small wrappers are installed as data: the one way that holds for pip and for colcon.
        (f"lib/{package_name}", glob("scripts/*")),
    ],
    python_requires=">=3.10",
    install_requires=[
        "apsw",
        "av>=17",
        'backports.zstd; python_version < "3.14"',
        "h5py",
        "jinja2",
        "lz4",
        "matplotlib",
        "numpy",
        "opencv-python-headless",
        "pandas",
        "pillow",
        "PyYAML",
        "rich",
        "rosbags",
        "torch",
    ],
    extras_require={
        "onnx": ["onnx", "onnxruntime", "onnxscript"],  # for training.export --to onnx
        "test": ["pytest"],  # without it `colcon test` finds no test runner
    },
    zip_safe=False,
)
