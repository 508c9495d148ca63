"""What a script of an operator does, with QEMU's own QMP library: argv is the control socket and the target."""

import asyncio
import sys

from qemu.qmp import QMPClient
from qemu.qmp.qmp_client import ExecuteError


async def refused(client, text, command, **arguments):
    """A command that has to fail with this text."""
    try:
        await client.execute(command, arguments)
    except ExecuteError as error:
        answer = error.received["error"]
        assert answer["desc"] == text, answer
        return answer["class"]
    raise AssertionError(f"{command} {arguments} was accepted")


async def bitmap(client):
    """The bitmap b0 as the node shows it."""
    nodes = await client.execute("query-named-block-nodes")
    node = next(node for node in nodes if node["node-name"] == "drive0")
    return next(bitmap for bitmap in node["dirty-bitmaps"] if bitmap["name"] == "b0")


async def main(socket, target):
    client = QMPClient("operator")
    await client.connect(socket)

    version = await client.execute("query-version")
    assert version["qemu"]["major"] >= 10, version
    commands = {command["name"] for command in await client.execute("query-commands")}
    assert {"block-dirty-bitmap-add", "drive-backup", "transaction", "query-jobs"} <= commands, commands

    node = {"node": "drive0", "name": "b0"}
    await client.execute("block-dirty-bitmap-add", {**node, "granularity": 32768, "persistent": False})
    found = await bitmap(client)
    assert found["granularity"] == 32768 and found["recording"] and not found["busy"] and found["count"] == 0, found
    await refused(client, "Bitmap already exists: b0", "block-dirty-bitmap-add", **node)
    await refused(client, "Parameter 'bogus' is unexpected", "block-dirty-bitmap-clear", bogus=1, **node)
    kind = await refused(client, "The command block-dirty-bitmap-ad has not been found", "block-dirty-bitmap-ad")
    assert kind == "CommandNotFound", kind

    names = ("JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR")
    with client.listener(names) as listener:
        await client.execute(
            "drive-backup",
            {"job-id": "j0", "device": "drive0", "target": target, "format": "qcow2", "sync": "full"},
        )
        states = []
        completed = None
        async for event in listener:
            if event["event"] == "JOB_STATUS_CHANGE":
                states.append(event["data"]["status"])
                if states[-1] == "null":
                    break
            else:
                assert event["event"] == "BLOCK_JOB_COMPLETED", event
                completed = event["data"]
    states = [state for state in states if state != "paused"]
    wanted = ["created", "running", "waiting", "pending", "concluded", "null"]
    assert [state for index, state in enumerate(states) if states[index - 1 : index] != [state]] == wanted, states
    assert completed["device"] == "j0" and completed["type"] == "backup" and "error" not in completed, completed
    assert completed["offset"] == completed["len"] == 4 << 20, completed
    assert await client.execute("query-jobs") == []

    # A second client beside the first is served at once, or (by QEMU) when the first has gone.
    await client.execute("block-dirty-bitmap-disable", node)
    await client.disconnect()
    second = QMPClient("another")
    await second.connect(socket)
    assert not (await bitmap(second))["recording"]
    await second.execute("block-dirty-bitmap-remove", node)
    await refused(second, "Dirty bitmap 'b0' not found", "block-dirty-bitmap-remove", **node)
    await second.disconnect()
    print("all is well")


asyncio.run(main(*sys.argv[1:]))
