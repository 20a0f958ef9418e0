# shellcheck shell=sh disable=SC2015,SC2034
# What `sly fleet enroll` made for a board: judged as a whole before it goes anywhere.
#
# Rules: keys are compared and copied, never shown; what belongs to two boards is refused here and not found out by the broker.

STATES=/var/lib/sly
IDENTITY_BYTES=32
PUBLIC_FILES='client.pem ca.pem root.json'
SECRET_FILES='identity.key device_root.key client.key'

# toml_value FILE SECTION KEY: one value as enroll writes it, without its quotes.
toml_value() {
    awk -v section="[$2]" -v key="$3" '
        /^\[/ { inside = ($0 == section); next }
        inside && index($0, key " = ") == 1 { value = substr($0, length(key) + 4); gsub(/^"|"$/, "", value); print value; exit }
    ' "$1"
}

judge_enrolment() {
    [ -d "$ENROLLED" ] || refuse '--enrolled' "$ENROLLED, which is no folder that user $(id -un) can find" "a board's folder" 'make one: sly fleet enroll'
    ENROLLED=$(CDPATH='' cd -- "$ENROLLED" && pwd -P) || refuse '--enrolled' 'a folder that cannot be entered' 'one that you may read'
    for name in agent.toml client.key $PUBLIC_FILES; do
        [ -f "$ENROLLED/$name" ] && [ -r "$ENROLLED/$name" ] && [ -s "$ENROLLED/$name" ] ||
            refuse '--enrolled' "$ENROLLED without a $name that can be read" 'all that sly fleet enroll made' \
                'enroll the board again: sly fleet enroll BOARD --again'
    done
    judge_board_of_enrolment
    judge_keys_of_enrolment
}

judge_board_of_enrolment() {
    BOARD_ID=$(toml_value "$ENROLLED/agent.toml" board id)
    case $BOARD_ID in
        '' | [!a-z0-9]* | *[!a-z0-9_-]*) refuse 'agent.toml: board.id' "${BOARD_ID:-nothing}" 'the id of a board' ;;
        agent) refuse 'agent.toml: board.id' agent 'another id: updates of the agent lie under this name' ;;
    esac
    enrolled_for=$(toml_value "$ENROLLED/agent.toml" board backend)
    [ "$enrolled_for" = "$BOARD" ] || [ "$enrolled_for" = auto ] ||
        refuse '--board' "$BOARD" "$enrolled_for, as which $BOARD_ID is enrolled" "or enroll it anew: sly fleet enroll $BOARD_ID --again"
    STATE=$STATES/$BOARD_ID
    told=$(toml_value "$ENROLLED/agent.toml" state folder)
    [ "$told" = "$STATE" ] || refuse 'agent.toml: state.folder' "$told" "$STATE" "enroll $BOARD_ID without --state"
}

judge_keys_of_enrolment() {
    for name in identity.key device_root.key; do
        [ ! -e "$ENROLLED/$name" ] || [ "$(wc -c <"$ENROLLED/$name")" -eq "$IDENTITY_BYTES" ] ||
            refuse "$name" "$(wc -c <"$ENROLLED/$name") bytes" "$IDENTITY_BYTES bytes" "enroll $BOARD_ID again"
    done
    command -v openssl >/dev/null || return 0
    named=$(openssl x509 -noout -subject -nameopt multiline -in "$ENROLLED/client.pem" 2>/dev/null | sed -n 's/^ *commonName *= //p')
    [ "$named" = "$BOARD_ID" ] || refuse 'client.pem' "the certificate of ${named:-nobody}" "that of $BOARD_ID" \
        "folders of two boards were mixed: enroll $BOARD_ID again"
    [ "$(openssl pkey -pubout -in "$ENROLLED/client.key" 2>/dev/null)" = \
        "$(openssl x509 -noout -pubkey -in "$ENROLLED/client.pem")" ] ||
        refuse 'client.key' 'a key of another certificate' 'the key of client.pem' "enroll $BOARD_ID again"
    [ ! -e "$ENROLLED/identity.key" ] || [ "$(public_key_of_identity)" = "$(toml_value "$ENROLLED/agent.toml" fleet.members "$BOARD_ID")" ] ||
        refuse 'identity.key' "another board's key" "that of $BOARD_ID, as its charter has it" "enroll $BOARD_ID again"
}

# The seed behind the head of an Ed25519 private key in PKCS #8 (RFC 8410, section 7); the last 32 bytes of what comes of it.
public_key_of_identity() {
    { printf '\060\056\002\001\000\060\005\006\003\053\145\160\004\042\004\040' && cat "$ENROLLED/identity.key"; } |
        openssl pkey -inform DER -pubout -outform DER 2>/dev/null | tail -c 32 | od -An -v -tx1 | tr -d ' \n'
}

# judge_identity: who the target is already.  Reads the target.
judge_identity() {
    [ -z "$WIPE" ] || return 0
    for name in $(root_list "$STATES" 2>/dev/null | grep -x '[a-z0-9][a-z0-9_-]*' || :); do
        [ "$name" = "$BOARD_ID" ] || [ "$(root_type "$STATES/$name/identity.key")" = none ] ||
            refuse "$STATES on the target" "the identity of $name" "nobody's, or that of $BOARD_ID" \
                "flash $name with its own folder, or remove it for ever: --wipe"
    done
    for name in identity.key device_root.key; do
        here=$(root_hash "$STATE/$name" 2>/dev/null || :)
        if [ -n "$here" ] && [ -e "$ENROLLED/$name" ]; then
            told=$(sha256sum <"$ENROLLED/$name")
            [ "$here" = "${told%% *}" ] || refuse "$STATE/$name on the target" "another key than the one enrolled for $BOARD_ID" \
                'the same key' 'use the folder that it was flashed with, or give it the new one: --wipe'
        fi
    done
    [ -n "$(root_hash "$STATE/identity.key" 2>/dev/null || :)" ] || [ -e "$ENROLLED/identity.key" ] ||
        refuse '--enrolled' "$ENROLLED without identity.key" "a board's own key, there or on the target" "enroll it again without --public-key"
}
