-- HEAD: the answer that GET would have, without its body. To the transcoder and what follows it is a call like others.

local answer = envoy_on_response

function envoy_on_response(handle)
  answer(handle)
  local length = handle:headers():get("content-length")
  handle:body(true):setBytes("")
  if length ~= nil then
    handle:headers():replace("content-length", length)
  else
    handle:headers():remove("content-length")
  end
end
