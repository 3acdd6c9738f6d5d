"""A stand-in for Modal's control plane on loopback: it answers what a deployment asks, and keeps what was asked.

Made from the service that modal's own package describes, as of modal 1.6. Nothing is built and nothing runs; calls that
a deployment does not make are refused as unimplemented.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from grpclib.server import Server
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase


class StandIn:
    """What was asked, by the call's name, and the bytes of all of it."""

    def __init__(self) -> None:
        self.asked: dict[str, list[Any]] = defaultdict(list)
        self.url = ""
        self._ids = 0

    @property
    def bytes(self) -> bytes:
        return b"".join(request.SerializeToString() for requests in self.asked.values() for request in requests)

    def answer(self, name: str, request: Any) -> Any:
        """The reply to a call.

        Raises:
            GRPCError: no deployment makes it.
        """
        self._ids += 1
        match name:
            case "ClientHello":
                return api_pb2.ClientHelloResponse(image_builder_version="2025.06")
            case "EnvironmentGetOrCreate":
                settings = api_pb2.EnvironmentSettings(image_builder_version="2025.06", webhook_suffix="")
                metadata = api_pb2.EnvironmentMetadata(name="main", settings=settings)
                return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)
            case "AppGetByDeploymentName":
                return api_pb2.AppGetByDeploymentNameResponse()
            case "AppCreate":
                return api_pb2.AppCreateResponse(app_id="ap-1", app_page_url="http://stand-in/ap-1")
            case "AppGetLayout":
                return api_pb2.AppGetLayoutResponse()
            case "AppSetTags" | "AppHeartbeat" | "AppClientDisconnect":
                return Empty()
            case "AppPublish":
                return api_pb2.AppPublishResponse(url="http://stand-in/fluxfire", deployed_at=1.0)
            case "SecretGetOrCreate":
                return api_pb2.SecretGetOrCreateResponse(secret_id=f"st-{self._ids}")
            case "VolumeGetOrCreate":
                return api_pb2.VolumeGetOrCreateResponse(volume_id=f"vo-{request.deployment_name}")
            case "MountGetOrCreate":
                return api_pb2.MountGetOrCreateResponse(mount_id=f"mo-{self._ids}")
            case "MountBatchedCheckExistence":
                return api_pb2.MountBatchedCheckExistenceResponse()
            case "MountPutFile":
                return api_pb2.MountPutFileResponse(exists=True)
            case "ImageGetOrCreate":
                return api_pb2.ImageGetOrCreateResponse(image_id=f"im-{self._ids}", result=self._built())
            case "ImageJoinStreaming":
                return api_pb2.ImageJoinStreamingResponse(result=self._built())
            case "FunctionPrecreate":
                return api_pb2.FunctionPrecreateResponse(function_id=f"fu-{request.function_name}")
            case "FunctionCreate":
                function = request.function
                metadata = api_pb2.FunctionHandleMetadata(
                    function_name=function.function_name, function_type=function.function_type, is_method=False
                )
                ranked = api_pb2.FunctionData.RankedFunction(rank=0, function=function)
                return api_pb2.FunctionCreateResponse(
                    function_id=request.existing_function_id or f"fu-{self._ids}",
                    function=function,
                    function_data=api_pb2.FunctionData(ranked_functions=[ranked]),
                    handle_metadata=metadata,
                )
        raise GRPCError(Status.UNIMPLEMENTED, name)

    @staticmethod
    def _built() -> Any:
        return api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS)


def _servicer(stand_in: StandIn) -> ModalClientBase:
    def handler(name: str) -> Any:
        async def handle(_self: Any, stream: Any) -> None:
            request = await stream.recv_message()
            stand_in.asked[name].append(request)
            await stream.send_message(stand_in.answer(name, request))

        return handle

    names = [name for name, _ in inspect.getmembers(ModalClientBase, inspect.isfunction) if not name.startswith("_")]
    return type("Servicer", (ModalClientBase,), {name: handler(name) for name in names})()


@contextmanager
def running() -> Iterator[StandIn]:
    """The stand-in on a port of its own, in a thread."""
    stand_in = StandIn()
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def serve() -> Server:
        server = Server([_servicer(stand_in)])
        await server.start("127.0.0.1", 0)
        assert server._server
        stand_in.url = f"http://127.0.0.1:{server._server.sockets[0].getsockname()[1]}"
        started.set()
        return server

    def run() -> None:
        server = loop.run_until_complete(serve())
        loop.run_forever()
        server.close()
        loop.run_until_complete(server.wait_closed())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    try:
        yield stand_in
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
