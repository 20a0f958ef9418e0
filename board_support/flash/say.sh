# shellcheck shell=sh
# What flash.sh says to people, how it ends, and what is put right however it ends.
#
# Rules: everything here goes to stderr, so that a function whose output is taken can speak; a message is one line and says what
# came, what is allowed and what to do; whoever makes something that must not stay (a mount, a folder) tells
# at_exit before it is made: a signal may come between any two commands.

AT_EXIT=

say() {
    printf '%s\n' "$*" >&2
}

# say_safely TEXT: on one line, whatever a target or a user put into it.
say_safely() {
    { printf '%s' "$1" | tr '\000-\037\177' '?' && echo; } >&2
}

# refuse SUBJECT GOT ALLOWED [REMEDY]: bad input; ends with 2.
refuse() {
    say_safely "flash.sh: $1: $2; allowed: $3${4:+; $4}"
    exit 2
}

# refuse_second OPTION TARGET: two at once would each remove what the other wrote.
refuse_second() {
    refuse "$1" "$2, on which another flash.sh is at work" 'one at a time' 'wait until that one has ended'
}

# fail SUBJECT REASON REMEDY: the world would not; ends with 1.
fail() {
    say_safely "flash.sh: $1: $2; $3"
    exit 1
}

# progress TEXT DONE ALL: one line that is written over where stderr is a terminal, else one line at the end; none for a handful.
progress() {
    [ "$3" -ge 10 ] || return 0
    if [ -t 2 ]; then
        printf '\r\033[K%s: %s of %s' "$1" "$2" "$3" >&2
        [ "$2" != "$3" ] || printf '\n' >&2
    elif [ "$2" = "$3" ]; then
        say "$1: $2 of $3"
    fi
}

# ask_for WORD QUESTION: goes on only if WORD is typed. --yes has said it already.
ask_for() {
    [ -z "$YES" ] || return 0
    [ -t 0 ] || refuse "$2" 'nobody to ask: stdin is no terminal' "the word $1, typed" 'say --yes if you are sure'
    printf '%s Type %s to go on: ' "$2" "$1" >&2
    read -r ASKED || ASKED=
    [ "$ASKED" = "$1" ] || refuse "$2" "${ASKED:-nothing}" "the word $1" 'nothing was changed'
}

# at_exit FUNCTION: run when this ends, also by a signal; the last one named runs first.  It bears that nothing was made yet.
at_exit() {
    AT_EXIT="$1 $AT_EXIT"
    trap 'run_at_exit $?' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

run_at_exit() {
    trap '' HUP INT TERM
    trap - EXIT
    for each in $AT_EXIT; do
        "$each" || say "flash.sh: $each did not end well"
    done
    exit "$1"
}
