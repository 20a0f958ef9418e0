# shellcheck shell=sh disable=SC2015,SC2034
# The tree goes onto the target: what it was made of before is noted, flashed.list goes, the tree comes, what is left over goes.
#
# Rules: from the first write to the last the board has no flashed.list; flashing.list holds all that this and earlier flashings
# may have left, so that one that was interrupted is forgotten by nobody; only what is_ours says is removed, and by --wipe the rest.

MAX_LIST_BYTES=262144
ENVIRONMENT_FOR_WHEELS=4
RESERVE_KIB=8192

# judge_room: an environment takes about four times its wheels (measured: 202 MiB of 55).
judge_room() {
    staged_kib=$(du -sk "$STAGE/tree" | cut -f 1)
    wheels_kib=$(du -sk "$STAGE/tree$SOFTWARE/wheels" | cut -f 1)
    needed_kib=$((staged_kib + ENVIRONMENT_FOR_WHEELS * wheels_kib + RESERVE_KIB))
    free_kib=$(($(root_free_kib) + ${IMAGE_GROW_KIB:-0}))
    [ "$free_kib" -ge "$needed_kib" ] || fail "room on $(target_looked_at)" \
        "$((free_kib / 1024)) MiB free, $((needed_kib / 1024)) MiB needed (with the environment that the first boot makes)" \
        "free some, or give an image more: --grow $(((needed_kib - free_kib) * 9 / 8 / 1024 + 1))M"
}

show_plan() {
    cat <<TEXT
board     $BOARD_ID, a $BOARD
onto      $(target_name): ${SYSTEM:-a system without a name}, $MACHINE, Python $PYTHON
agent     ${AGENT:-to be packed}
writes    $(grep -vc '^#' "$STAGE/list") entries, $((staged_kib / 1024)) MiB: $SOFTWARE, /etc/sly, services, $STATE
identity  $(identity_told)
TEXT
    for name in $(models_missing); do
        say "note: the board serves $name, which is neither in --models nor on the target: give it, or push it later (sly ota push)"
    done
}

# models_missing: names that agent.toml serves and that neither the tree nor the target has a file of.
models_missing() {
    there=$({ [ -n "$WIPE" ] || root_list "$SOFTWARE/models" 2>/dev/null; ls "$STAGE/tree$SOFTWARE/models"; } || :)
    for name in $(toml_value "$ENROLLED/agent.toml" models serve | tr -d '[]",'); do
        printf '%s\n' "$there" | grep -q "^$name\." || printf '%s\n' "$name"
    done
}

identity_told() {
    if [ -n "$WIPE" ]; then echo 'what was there is removed (--wipe)'
    elif [ "$(root_type "$STATE/identity.key")" = f ]; then echo 'is there already, and stays with its ledger and its models'
    else echo "new on this system"
    fi
}

apply_tree() {
    lists_before >"$STAGE/flashing"
    cut -s -f 1,3 "$STAGE/list" >>"$STAGE/flashing"
    sort -u -o "$STAGE/flashing" "$STAGE/flashing"
    put_one "$FLASHING" "$STAGE/flashing"
    root_remove "$FLASHED"
    root_sync
    [ -z "$WIPE" ] || wipe
    root_apply "$STAGE/list" "$STAGE/tree"
    remove_left_over
    root_sync
}

# lists_before: type and path of all that earlier flashings wrote.
lists_before() {
    if [ "$(root_type "$FLASHED")" = f ]; then root_cat "$FLASHED" | head -c "$MAX_LIST_BYTES" | cut -s -f 1,3; fi
    if [ "$(root_type "$FLASHING")" = f ]; then root_cat "$FLASHING" | head -c "$MAX_LIST_BYTES"; fi
}

# put_one PATH SOURCE: one file of ours, 0644.
put_one() {
    mkdir -p -- "$STAGE/one$SOFTWARE"
    cat -- "$2" >"$STAGE/one$1"
    digest=$(sha256sum <"$STAGE/one$1")
    printf 'd\t0755\t%s\t-\nf\t0644\t%s\t%s\n' "$SOFTWARE" "$1" "${digest%% *}" >"$STAGE/one.list"
    root_apply "$STAGE/one.list" "$STAGE/one"
}

wipe() {
    root_remove "$STATES"
    for name in $(root_list "$SOFTWARE"); do
        [ "$SOFTWARE/$name" = "$FLASHING" ] || root_remove "$SOFTWARE/$name"
    done
}

# Files first; then folders, the deepest first, if nothing is in them any more.
remove_left_over() {
    awk -F "$TAB" 'NR == FNR { now[$3]; next } !($2 in now)' "$STAGE/list" "$STAGE/flashing" | sort -r -k 2 >"$STAGE/left"
    while IFS="$TAB" read -r kind path; do
        if is_ours "$path"; then remove_entry "$kind" "$path"; fi
    done <"$STAGE/left"
}

remove_entry() {
    if [ "$1" = d ]; then
        root_remove_empty "$2"
    else
        root_remove "${2%/*}/.${2##*/}.sly-part"
        [ "$(root_type "$2")" = d ] || root_remove "$2"
    fi
}

# finish_tree: only after verify_tree.  Durable before the list of what is unfinished goes; target_keep makes that durable.
finish_tree() {
    flashed_list >"$STAGE/flashed"
    put_one "$FLASHED" "$STAGE/flashed"
    root_sync
    verify_list "$STAGE/one.list"
    root_remove "$FLASHING"
}

tell_next() {
    echo
    echo "$(target_name) is the board $BOARD_ID now. Next:"
    case $TARGET in
        folder) echo '  unmount it, and start the board from it' ;;
        image) echo "  write it to a card: ./flash.sh ... --device /dev/sdX, or dd if=$OUT of=/dev/sdX bs=4M conv=fsync" ;;
        device) echo "  put it into the board, and switch it on" ;;
        remote) echo "  nothing: it is starting" ;;
    esac
    echo "  its first start makes the agent's environment (minutes on a slow card; no network), then it joins the fleet"
    echo "  see it come:            sly fleet watch"
    echo "  what it says of itself: sly fleet show $BOARD_ID; on the board: journalctl -u sly-first-boot -u sly-agent"
    echo "  $ENROLLED is as secret as the board: keep it as such, or remove it and enroll anew to flash again"
}
