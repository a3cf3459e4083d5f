# shellcheck shell=bash
# Sourced by the scripts that start training: their options, how they are used, and which exit codes mean that a run goes on.

PREEMPTED=42 # training saved itself after SIGTERM or SIGINT

DRY_RUN=${DRY_RUN:-}
# The comment at the head of the script that is running: read before the script goes to another directory, as $0 may be relative.
USAGE=$(sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0")

# mistake MESSAGE: says what is wrong and how the script is used, and ends it.
mistake() {
    echo "${0##*/}: $1" >&2
    echo "$USAGE" >&2
    exit 2
}

# option WORD: obeys a word before the command that begins with a dash. One that is misspelt must not pass for the command.
option() {
    case $1 in
        --dry-run) DRY_RUN=1 ;;
        -h | --help)
            echo "$USAGE"
            exit
            ;;
        *) mistake "there is no option '$1'" ;;
    esac
}

# run COMMAND...: carries it out, or with DRY_RUN prints it, quoted so that a shell reads it as it is meant.
run() {
    if [ -n "$DRY_RUN" ]; then
        printf '%q ' "$@" | sed 's/ $//'
        echo
    else
        "$@"
    fi
}

# goes_on STATUS...: whether a run whose processes failed with these goes on when it is started again: all were preempted or
# lost, and none had an error of its own. 137 is SIGKILL: a machine that is going, or too little memory. The others notice that
# a process is lost when a step fails (43), or when its heartbeat is missing: JAX then aborts them (134).
goes_on() {
    local status
    for status in "$@"; do
        case $status in
            "$PREEMPTED" | 43 | 134 | 137) ;;
            *) return 1 ;;
        esac
    done
}
