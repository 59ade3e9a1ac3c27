{{/* Value that a Secret of the release already has, empty when it does not exist: dict root, secret, key. */}}
{{- define "sf.kept" -}}
{{- $secret := lookup "v1" "Secret" .root.Release.Namespace .secret -}}
{{- with $secret }}{{ get (.data | default dict) $.key | b64dec }}{{ end -}}
{{- end -}}
