{{/* Model of the first curl: that of the test, else the first of the first embedding pool. */}}
{{- define "sf.testModel" -}}
{{- $found := .Values.tests.model -}}
{{- range (include "sf.pools" . | fromYaml).pools -}}
{{- if and (not $found) (has "embed" .capabilities) }}{{ $found = first .models }}{{ end -}}
{{- end -}}
{{- $found -}}
{{- end -}}

{{/* Models of the first pool of each capability, by capability, that the test may ask; empty without any. */}}
{{- define "sf.testModels" -}}
{{- $found := dict -}}
{{- range $pool := (include "sf.pools" . | fromYaml).pools -}}
{{- range .capabilities -}}
{{- if not (hasKey $found .) }}{{ $_ := set $found . $pool.models }}{{ end -}}
{{- end -}}
{{- end -}}
{{- with .Values.tests.model }}{{ $_ := set $found "embed" (list .) }}{{ end -}}
{{- toJson $found -}}
{{- end -}}

{{/* Secret entry with a key for the test; name and key, the name empty when there is none. */}}
{{- define "sf.testKey" -}}
{{- $auth := .Values.auth -}}
{{- if .Values.tests.apiKeySecret.name -}}
{{- toYaml .Values.tests.apiKeySecret -}}
{{- else if and $auth.enabled $auth.bootstrapKey.enabled (not $auth.existingSecret) (not $auth.keys) -}}
{{- dict "name" (printf "%s-bootstrap-key" (include "sf.fullname" .)) "key" "api-key" | toYaml -}}
{{- else -}}
{{- dict "name" "" "key" "" | toYaml -}}
{{- end -}}
{{- end -}}
