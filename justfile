# What CI runs is `just test`; each step can be run alone. Nothing here does more than the scripts do.

# Everything that has to hold before a change is good.
test *arguments:
    scripts/test {{arguments}}

# A disk served, written to, backed up live, restored, proved.
demo:
    scripts/demo

# Installs what building and testing need.
setup:
    scripts/setup

fmt:
    cargo fmt --all

lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings

# Every interleaving of the flip's small cases.
models:
    scripts/models

# One fuzz target for so many seconds; without arguments, which there are.
fuzz *arguments:
    scripts/fuzz {{arguments}}

# The rooms with unsafe code under AddressSanitizer.
sanitize *arguments:
    scripts/sanitize {{arguments}}

# Licences, advisories, sources, duplicates (needs cargo-deny).
deny:
    cargo deny check

# blkmark beside qemu-storage-daemon on the same file.
bench *arguments:
    cargo run --release --locked --package blkmark-tests --bin bench -- {{arguments}}
