# shellcheck shell=sh disable=SC2015
# What was written is read back through the root, every entry: type, mode, owner, digest.
#
# Rules: all that differs is told, not the first alone; who differs has no flashed.list.

verify_tree() {
    verify_list "$STAGE/list"
    say 'verified: every file, mode and owner is what was meant'
}

# verify_list LIST
verify_list() {
    [ "$ROOT_KIND" != remote ] || remote_ahead "$1"
    wrong=0 checked=0 entries=$(grep -vc '^#' "$1" || :)
    while IFS="$TAB" read -r kind mode path digest; do
        verify_entry "$kind" "$mode" "$path" "$digest" || wrong=$((wrong + 1))
        checked=$((checked + 1))
        progress 'read back' "$checked" "$entries"
    done <"$1"
    [ "$wrong" = 0 ] || fail "$(target_name)" "$wrong of $entries entries are not what was written" \
        'is the card or the disk failing? it is not finished: flash again, or take another'
}

verify_entry() (
    is=$(root_type "$3")
    [ "$is" = "$1" ] || { differs "$3" "$(type_name "$is")" "$(type_name "$1")"; return 1; }
    case $1 in
        f) is=$(root_hash "$3") ;;
        l) is=$(root_link "$3") ;;
        *) is=- ;;
    esac
    [ "$is" = "$4" ] || { differs "$3" "$is" "$4"; return 1; }
    [ "$1" != l ] || return 0
    is=$(root_meta "$3")
    [ "$is" = "$2 0 0" ] || { differs "$3" "mode and owner $is" "$2 0 0"; return 1; }
)

differs() {
    say_safely "flash.sh: $1 on the target: $2; written was: $3"
}
