# shellcheck shell=sh disable=SC2034
# What runs on the machine that is flashed over SSH, besides folder.sh.  remote.sh sends both along with every command.
#
# Rules: nothing of this stays there: what was received goes when this ends, however it ends; what is missing there (systemd in a
# container) is not an error.

# end_receive LIST_BYTES: a list and a tar stream on stdin, applied.
end_receive() {
    RECEIVED=
    at_exit end_forget
    RECEIVED=$(mktemp -d /var/tmp/sly-flash.XXXXXX) || fail '/var/tmp on the target' 'no folder could be made in it' 'is it full?'
    dd bs=1 count="$1" >"$RECEIVED/list" 2>/dev/null
    mkdir -- "$RECEIVED/tree"
    tar -C "$RECEIVED/tree" -xf - || fail 'what was sent' 'it did not come whole' 'is there room in /var/tmp? flash again'
    folder_apply "$RECEIVED/list" "$RECEIVED/tree"
}

end_forget() {
    [ -z "$RECEIVED" ] || rm -rf -- "$RECEIVED"
}

# end_hold: says whether this machine is now held for one flash.sh, and holds it until stdin ends, as it does when the connection goes.
end_hold() {
    if ! command -v flock >/dev/null || folder_lock /; then echo held; else echo taken; fi
    cat >/dev/null
}

# end_facts: of every entry of a list on stdin: path, type, meta, digest, link by tabs; - for what it has not.
end_facts() {
    while IFS="$TAB" read -r kind mode path digest; do
        case $kind in '#'*) continue ;; esac
        printf '%s\t%s\t%s\t%s\t%s\n' "$path" "$(folder_type "$path")" "$(folder_meta "$path" || echo -)" \
            "$(folder_hash "$path" || echo -)" "$(folder_link "$path" || echo -)"
    done
}

end_name() {
    model=$(tr -cd 'A-Za-z0-9 ._-' 2>/dev/null </proc/device-tree/model || :)
    echo "$(uname -n), ${model:-$(uname -m)}, Linux $(uname -r)"
}

end_has_systemd() {
    [ -d /run/systemd/system ] && command -v systemctl >/dev/null
}

# active, inactive, or new: whether the agent runs there.
end_agent() {
    if ! end_has_systemd || [ ! -e /etc/systemd/system/sly-agent.service ]; then echo new
    elif systemctl is-active --quiet sly-agent.service; then echo active
    else echo inactive
    fi
}

end_stop() {
    systemctl stop sly-agent.service sly-first-boot.service
}

end_reload() {
    if end_has_systemd; then systemctl daemon-reload; fi
}

end_start() {
    end_has_systemd || return 0
    systemctl daemon-reload
    udevadm control --reload 2>/dev/null || :
    systemctl --no-block restart sly-first-boot.service
    systemctl --no-block start sly-agent.service
}
