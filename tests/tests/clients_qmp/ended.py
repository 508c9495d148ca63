"""A client that comes after a job ended with the daemon before: it hears of it before it has asked for anything."""

import asyncio
import sys

from qemu.qmp import EventListener, QMPClient


async def main(socket):
    client = QMPClient("late")
    listener = EventListener(("BLOCK_JOB_COMPLETED", "JOB_STATUS_CHANGE"))
    client.register_listener(listener)
    await client.connect(socket)
    end = await asyncio.wait_for(listener.get(), 60)
    assert end["event"] == "BLOCK_JOB_COMPLETED" and end["data"]["device"] == "inc" and end["data"]["error"], end
    state = await asyncio.wait_for(listener.get(), 60)
    assert state["event"] == "JOB_STATUS_CHANGE" and state["data"] == {"id": "inc", "status": "concluded"}, state
    # Whoever listens from his order on hears nothing of it.
    with client.listener(("BLOCK_JOB_COMPLETED",)) as later:
        await client.execute("query-jobs")
        assert later.empty(), later.get()
    await client.disconnect()
    print("all is well")


asyncio.run(main(sys.argv[1]))
