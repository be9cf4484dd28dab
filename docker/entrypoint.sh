#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ROS, this package, and its transport profile (unless there is another one); then the command, in place of this shell, so that
# signals reach it.
set -e
source "/opt/ros/$ROS_DISTRO/setup.bash"
source /opt/deq_flow_ros/install/setup.bash
export FASTRTPS_DEFAULT_PROFILES_FILE="${FASTRTPS_DEFAULT_PROFILES_FILE:-/opt/deq_flow_ros/install/share/deq_flow_ros/config/fastdds.xml}"
# A user given by `docker run --user` has no home here, and ROS refuses to start without a place for its logs.
if [ ! -w "$HOME" ]; then
    export ROS_LOG_DIR="${ROS_LOG_DIR:-/tmp/ros_log}"
fi
exec "$@"
