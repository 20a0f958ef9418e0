# shellcheck shell=sh disable=SC2015
# What makes a board reachable, and is its owner's afterwards: Wi-Fi, who may log in, the name of the machine.
#
# Rules: a password is read from a file, never from the command line, and is never shown; nothing that was there is lost: a key is
# added, a network of another name stays; flashing again without these options leaves them as they are.

NM=/etc/NetworkManager/system-connections
AUTHORIZED=/root/.ssh/authorized_keys

judge_network_options() {
    case $HOSTNAME_WANTED in
        -* | *- | *[!a-z0-9-]*) refuse '--hostname' "$HOSTNAME_WANTED" 'small letters, digits and -, as in kitchen-1 (RFC 1123)' ;;
    esac
    [ "${#HOSTNAME_WANTED}" -le 63 ] || refuse '--hostname' "${#HOSTNAME_WANTED} characters" 'at most 63'
    if [ -n "$SSH_KEY" ]; then judge_ssh_key; fi
    if [ -n "$MODELS" ]; then judge_models; fi
    [ -n "$WIFI" ] || [ -z "$WIFI_PASSWORD_FILE" ] || refuse '--wifi-password-file' 'no --wifi' 'the name of the network besides'
    [ -z "$WIFI" ] || [ -n "$WIFI_PASSWORD_FILE" ] || refuse '--wifi' "$WIFI" 'with --wifi-password-file FILE'
    if [ -n "$WIFI" ]; then judge_wifi; fi
}

judge_ssh_key() {
    [ -f "$SSH_KEY" ] && [ -r "$SSH_KEY" ] || refuse '--ssh-key' "$SSH_KEY" 'a file that can be read' 'make a key: ssh-keygen -t ed25519'
    ! grep -q 'PRIVATE KEY' "$SSH_KEY" || refuse '--ssh-key' "$SSH_KEY, a private key" 'the public one' "is it $SSH_KEY.pub?"
    [ -s "$SSH_KEY" ] && ! grep -vEq '^(ssh-(ed25519|rsa)|ecdsa-sha2-nistp[0-9]+|sk-[a-z0-9@.-]+) [A-Za-z0-9+/]+=*( .*)?$' "$SSH_KEY" ||
        refuse '--ssh-key' "$SSH_KEY, which holds something else" 'public keys, one a line, as ssh-keygen writes them'
}

judge_models() {
    [ -d "$MODELS" ] || refuse '--models' "$MODELS, which is no folder" 'a folder of models' 'fill one: sly models fetch --all --folder DIR'
    model_files >/dev/null
    [ -n "$(model_files)" ] || refuse '--models' "$MODELS without any model" 'files that sly models fetch made'
}

# model_files: names in --models that go to the board; photographs stay here.
model_files() {
    for path in "$MODELS"/*; do
        case $path in *.png | *.jpg | *.part) continue ;; esac
        [ -f "$path" ] || continue
        case ${path##*/} in *[!A-Za-z0-9._+-]*) refuse '--models' "${path##*/}" 'names of letters, digits and ._+-' ;; esac
        printf '%s\n' "${path##*/}"
    done
}

judge_wifi() {
    [ "${#WIFI}" -le 32 ] || refuse '--wifi' "${#WIFI} bytes" 'at most 32 (IEEE 802.11)'
    [ -f "$WIFI_PASSWORD_FILE" ] && [ -r "$WIFI_PASSWORD_FILE" ] ||
        refuse '--wifi-password-file' "$WIFI_PASSWORD_FILE" 'a file that can be read'
    WIFI_PASSWORD=$(cat -- "$WIFI_PASSWORD_FILE")
    case $WIFI_PASSWORD in *[!\ -~]*) refuse '--wifi-password-file' 'characters that WPA does not take' 'one line of ASCII' ;; esac
    [ "${#WIFI_PASSWORD}" -ge 8 ] && [ "${#WIFI_PASSWORD}" -le 63 ] ||
        refuse '--wifi-password-file' "${#WIFI_PASSWORD} characters" '8 to 63, as WPA2 and WPA3 have it'
}

# judge_network_of_target: what of it this target can hold.  Reads the target.
judge_network_of_target() {
    WIFI_BY=
    if [ -n "$WIFI" ]; then
        if root_has f /usr/sbin/NetworkManager; then WIFI_BY=network_manager
        elif root_has f /usr/sbin/wpa_supplicant || root_has f /sbin/wpa_supplicant; then WIFI_BY=networkd
        else refuse '--wifi' "$(target_looked_at), which has neither NetworkManager nor wpa_supplicant" 'a system with one of them'
        fi
    fi
    if [ -n "$SSH_KEY" ]; then
        judge_kind /root/.ssh d 'a folder, or nothing'
        judge_kind "$AUTHORIZED" f 'a file, or nothing'
    fi
}

stage_network() {
    if [ -n "$HOSTNAME_WANTED" ]; then
        printf '%s\n' "$HOSTNAME_WANTED" >"$STAGE/made"
        stage_file 0644 /etc/hostname "$STAGE/made"
    fi
    if [ -n "$SSH_KEY" ]; then stage_ssh_key; fi
    if [ -n "$WIFI" ]; then stage_wifi; fi
}

stage_ssh_key() {
    { root_cat "$AUTHORIZED" 2>/dev/null || :; } | awk 1 >"$STAGE/made"
    while read -r line || [ -n "$line" ]; do
        grep -Fqx -- "$line" "$STAGE/made" || printf '%s\n' "$line" >>"$STAGE/made"
    done <"$SSH_KEY"
    [ "$(root_type /root/.ssh)" = d ] || stage_folder 0700 /root/.ssh
    stage_file 0600 "$AUTHORIZED" "$STAGE/made"
}

stage_wifi() {
    case $WIFI_BY in
        network_manager)
            wifi_for_network_manager >"$STAGE/made"
            stage_file 0600 "$NM/sly-wifi.nmconnection" "$STAGE/made"
            ;;
        networkd) stage_wifi_for_networkd ;;
    esac
}

# decimal_bytes, hexadecimal_bytes TEXT: a name of any bytes needs no quotes so.
decimal_bytes() { printf '%s' "$1" | od -An -v -tu1 | tr -s ' \n' ';' | sed 's/^;//'; }
hexadecimal_bytes() { printf '%s' "$1" | od -An -v -tx1 | tr -d ' \n'; }

# nm-settings-keyfile(5)
wifi_for_network_manager() {
    cat <<TEXT
[connection]
id=sly-wifi
type=wifi
autoconnect=true

[wifi]
mode=infrastructure
ssid=$(decimal_bytes "$WIFI")

[wifi-security]
key-mgmt=wpa-psk
psk=$(printf '%s' "$WIFI_PASSWORD" | sed -e 's/\\/\\\\/g' -e 's/ /\\s/g')

[ipv4]
method=auto

[ipv6]
method=auto
TEXT
}

# wpa_supplicant.conf(5), systemd.network(5): wlan0, the name of the first interface where nobody renames it.
stage_wifi_for_networkd() {
    printf 'ctrl_interface=DIR=/run/wpa_supplicant\nnetwork={\n\tssid=%s\n\tpsk="%s"\n}\n' "$(hexadecimal_bytes "$WIFI")" "$WIFI_PASSWORD" \
        >"$STAGE/made"
    stage_file 0600 /etc/wpa_supplicant/wpa_supplicant-wlan0.conf "$STAGE/made"
    printf '[Match]\nName=wlan0\n\n[Network]\nDHCP=yes\n' >"$STAGE/made"
    stage_file 0644 /etc/systemd/network/30-sly-wifi.network "$STAGE/made"
    wanted=/etc/systemd/system/multi-user.target.wants
    stage_link "$wanted/wpa_supplicant@wlan0.service" /lib/systemd/system/wpa_supplicant@.service
    stage_link "$wanted/systemd-networkd.service" /lib/systemd/system/systemd-networkd.service
}
