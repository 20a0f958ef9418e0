# shellcheck shell=sh disable=SC2015,SC2034
# What is known of each kind of board before one is seen: its machines, and the systems that its Python was tried with.
#
# Rules: facts only; docs/boards.md says which of them were checked, and how.

BOARDS='jetson, coral, raspberry_pi or jalapeno'
OLDEST_PYTHON_MINOR=11

# board_machines KIND: machines (uname -m) that such a board may be; fails for a kind that there is not.
board_machines() {
    case $1 in
        jetson | raspberry_pi) echo 'aarch64' ;;
        coral | jalapeno) echo 'aarch64 x86_64' ;;
        *) return 1 ;;
    esac
}

# board_system KIND: what to take for it.
board_system() {
    case $1 in
        jetson) echo 'JetPack 6 (Ubuntu 22.04) with python3.11 beside its own' ;;
        raspberry_pi) echo 'Raspberry Pi OS Lite (64-bit) of Debian 12 or later' ;;
        coral) echo 'Debian 12 or later on its host, 64-bit' ;;
        jalapeno) echo 'Debian 12 or later, 64-bit' ;;
    esac
}
