#!/blkmark/bin/busybox sh
# The first process of a test guest: it loads the drivers and then runs the shell lines that come over ttyS1.
# An order is one line, "NUMBER HEX-OF-SHELL-LINE"; the answer is the output, then "@@NUMBER STATUS" on its own line.
box=/blkmark/bin/busybox
for folder in proc sys dev run tmp mnt; do $box mkdir -p /$folder; done
$box --install -s /blkmark/bin
export PATH=/blkmark/sbin:/blkmark/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
exec </dev/console >/dev/console 2>&1
for module in $(cat /blkmark/modules.order); do insmod /blkmark/modules/$module || echo "blkmark: cannot load $module"; done

enter=
root=$(sed -n 's/.*blkmark\.root=\([^ ]*\).*/\1/p' /proc/cmdline)
if [ -n "$root" ]; then
    mkdir -p /root-image
    mount "$root" /root-image || echo "blkmark: cannot mount $root"
    for folder in dev proc sys run tmp; do
        mkdir -p /root-image/$folder
        mount -o bind /$folder /root-image/$folder
    done
    enter="chroot /root-image env PATH=/usr/sbin:/usr/bin:/sbin:/bin"
fi

stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1 2>&1
echo "@@ready"
while read -r number hex; do
    if [ "$number" = poweroff ]; then
        sync
        umount -a -r 2>/dev/null
        poweroff -f
    fi
    line=$(printf '%s' "$hex" | xxd -r -p)
    $enter sh -c "$line" </dev/null
    printf '\n@@%s %d\n' "$number" $?
done
echo "blkmark: orders ended" >/dev/console
poweroff -f
