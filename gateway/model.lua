-- GET /v1/models/<something unknown>: hands the name to the gateway's 404.

local function unescape(digits)
  return string.char(tonumber(digits, 16))
end

local request_id = envoy_on_request

function envoy_on_request(handle)
  request_id(handle)
  local name = string.match(handle:headers():get(":path"), "/v1/models/([^?]*)")
  name = string.gsub(name or "", "%%(%x%x)", unescape)
  handle:streamInfo():dynamicMetadata():set(NAMESPACE, UNKNOWN_MODEL, string.sub(name, 1, 128))
end

envoy_on_response = nil
