#!/usr/bin/env bash
# A stand-in for .venv/bin/python on a simulated VM: records its arguments and ends as $STUB_DIR/codes says: one line per
# start, one code per worker; the last line stays. hang: until SIGTERM, then 75; save: the same after a second
# of saving; early: until any signal, as before the program handles them; stuck: until SIGKILL.
count=$(($(cat "$STUB_DIR/starts.$STUB_WORKER" 2>/dev/null || echo 0) + 1))
echo "$count" >"$STUB_DIR/starts.$STUB_WORKER"
printf '%s\0' "$@" >"$STUB_DIR/argv.$STUB_WORKER.$count"
env -0 >"$STUB_DIR/env.$STUB_WORKER.$count"
line=$(sed -n "${count}p" "$STUB_DIR/codes")
[[ $line ]] || line=$(tail -n 1 "$STUB_DIR/codes")
read -ra codes <<<"$line"
code=${codes[$STUB_WORKER]:-${codes[0]}}
echo "worker $STUB_WORKER start $count"
case $code in
  hang)
    trap 'echo saving; exit 75' TERM
    touch "$STUB_DIR/ready.$STUB_WORKER.$count"
    while :; do sleep 0.05; done
    ;;
  save)
    trap 'echo saving; sleep 1; echo saved; exit 75' TERM
    touch "$STUB_DIR/ready.$STUB_WORKER.$count"
    while :; do sleep 0.05; done
    ;;
  early)
    touch "$STUB_DIR/ready.$STUB_WORKER.$count"
    while :; do sleep 0.05; done
    ;;
  stuck)
    trap '' TERM
    touch "$STUB_DIR/ready.$STUB_WORKER.$count"
    while :; do sleep 0.05; done
    ;;
esac
exit "$code"
