-- Calls of gRPC callers: they get a request id, and errors stay as the service sent them. Their own headers pass,
-- GRPC_KNOWN, a deadline only if it is one.

local as_rest = envoy_on_request

for _, name in ipairs(GRPC_KNOWN) do
  KNOWN[name] = true
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local timeout = headers:get("grpc-timeout")
  if timeout ~= nil and (#timeout > 9 or not find(timeout, "^%d+[HMSmun]$")) then
    headers:remove("grpc-timeout")
  end
  as_rest(handle)
end

envoy_on_response = nil
