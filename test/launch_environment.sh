#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs the tests that need what ROS has and the wheels do not: launch, launch_ros, launch_testing, message_filters and
# sensor_msgs_py, from their sources (all Python), in a copy of .venv. Without arguments those tests, else any of pytest.
#
#     test/launch_environment.sh [PYTEST_ARGS ...]        after `make venv`; ENVIRONMENT=/somewhere keeps the copy there
set -eu
cd "$(dirname "$0")/.."
sources=${SOURCES:-https://github.com/ros2}
environment=${ENVIRONMENT:-$PWD/build/launch_venv}
python=$environment/bin/python
if [ ! -e "$environment/.complete" ]; then
    mkdir -p "$(dirname "$environment")"
    rm -rf "$environment" && cp -a "${VENV:-.venv}/." "$environment"
    "$python" -m pip install --quiet "pytest<8" osrf-pycommon # launch_testing fails with a later pytest
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    checkout=$(mktemp -d)
    for repository in launch launch_ros message_filters common_interfaces; do
        git clone --quiet --depth 1 --branch jazzy "$sources/$repository" "$checkout/$repository"
    done
    for package in launch/launch launch/launch_testing launch/launch_xml launch/launch_yaml launch_ros/launch_ros; do
        "$python" -m pip install --quiet --no-deps --no-build-isolation "$checkout/$package"
    done
    cp -r "$checkout/message_filters/src/message_filters" "$checkout/common_interfaces/sensor_msgs_py/sensor_msgs_py" "$packages"
    # launch_ros imports the messages of components, which it needs for these alone; they would have to be compiled.
    mkdir -p "$packages/composition_interfaces/srv"
    touch "$packages/composition_interfaces/__init__.py"
    printf 'class LoadNode:\n    Request = Response = object\n' >"$packages/composition_interfaces/srv/__init__.py"
    rm -rf "$checkout"
    touch "$environment/.complete"
fi
export PATH="$environment/bin:$PATH" VIRTUAL_ENV="$environment" AMENT_PREFIX_PATH="$environment"
[ $# -gt 0 ] || set -- test/ros/test_launch_arguments.py test/ros/test_launch_files.py test/ros/test_examples.py test/ros/test_convert.py
exec "$python" -m pytest "$@"
